"""The one exception that the command line turns into a sentence."""


class HLAError(Exception):
    """A mistake in what the user gave (a file, a value, a folder), told in one clear sentence.

    The commands print the sentence to standard error and end with exit status 1; everything else that is raised
    is a bug of the library, not of its user.
    """
