import subprocess
import sys


def test_importing_the_room_stays_light():
    code = "import sys, isthmus.metrics; print([m for m in ('matplotlib', 'sklearn', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
