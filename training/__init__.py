"""Store to aligned backbone: `python -m training train --store STORE`."""
