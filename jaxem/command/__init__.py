"""What the command line does between reading a file and writing one: read, grid, report, picture."""


class Refusal(Exception):
    """A request that cannot be met: one line that names what is wrong and the remedy."""
