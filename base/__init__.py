"""What every room stands on: errors, files, batches of data. Imports nothing of Isthmus."""
