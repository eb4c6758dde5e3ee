"""Hugging Face folder -> Megatron checkpoint.

    python tools/hf_to_megatron.py --hf DIR --out DIR [--tp N --pp N --ep N --dtype D --verify]

`megatron-srpo convert` under the name that other projects have for it.
"""

import sys

from megatron_srpo.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
