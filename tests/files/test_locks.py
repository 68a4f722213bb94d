"""One writer at a time, however many start at once."""

import subprocess
import sys

from processes import DEADLINE, ROOT

# Twenty processes try at once; whoever holds the directory keeps it until all have tried.
TWENTY = """
import os, sys
from asymvq_jax.errors import OutputError
from asymvq_jax.files.locks import only_owner

tried, told = os.pipe()
over, end = os.pipe()
for _ in range(20):
    if os.fork() == 0:
        os.close(end)
        try:
            with only_owner(sys.argv[1], "run"):
                os.write(told, b"trains\\n")
                os.read(over, 1)
        except OutputError as error:
            os.write(told, f"{error}\\n".encode())
        os._exit(0)
os.close(told)
lines = b""
while lines.count(b"\\n") < 20:
    lines += os.read(tried, 65536)
os.close(end)
for _ in range(20):
    os.wait()
print(lines.decode(), end="")
"""


def test_of_twenty_processes_in_one_directory_one_works_and_the_others_name_it(tmp_path):
    command = [sys.executable, "-c", TWENTY, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=DEADLINE)
    lines = done.stdout.splitlines()
    refused = f"another run is writing {tmp_path}; wait for its end, or choose another directory"
    assert sorted(lines) == [refused] * 19 + ["trains"]
