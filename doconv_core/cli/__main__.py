"""The command as `python -m doconv_core.cli`, where another program has the name `doconv`."""

from doconv_core.cli.command import main

if __name__ == "__main__":
    main()
