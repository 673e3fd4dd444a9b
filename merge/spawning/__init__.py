"""Networks forked from one training: when does the path between them become straight?"""
