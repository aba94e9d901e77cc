"""python -m graftlm, and accelerate launch -m graftlm."""

from graftlm.cli import main

if __name__ == "__main__":
    main()
