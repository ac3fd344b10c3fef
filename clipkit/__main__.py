"""python -m clipkit, which is what `accelerate launch -m clipkit` and `torchrun -m clipkit` start."""

from clipkit.cli.main import main

if __name__ == "__main__":
    main()
