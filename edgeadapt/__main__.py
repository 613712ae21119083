"""``python -m edgeadapt``."""

from edgeadapt.program import main

if __name__ == "__main__":
    main()
