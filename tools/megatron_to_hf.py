"""Megatron checkpoint -> Hugging Face folder.

    python tools/megatron_to_hf.py --ckpt DIR --out DIR [--dtype D --verify]

`megatron-srpo convert` under the name that other projects have for it.
"""

import sys

from megatron_srpo.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
