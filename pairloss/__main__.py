"""The command `pairloss`."""

import sys


def main() -> None:
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"pairloss: the command needs {error.name}; install it with: pip install 'pairloss[cli]'")
    app()


if __name__ == "__main__":
    main()
