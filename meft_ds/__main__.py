# SPDX-License-Identifier: Apache-2.0
"""`python -m meft_ds` is `meft-ds`."""

from meft_ds.cli.main import main

if __name__ == "__main__":
    main()
