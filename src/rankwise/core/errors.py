"""The one error type of the project that callers may want to tell from a bad argument."""


class CalibrationError(ValueError):
    """Statistics are missing, empty or not finite; the message names the layer and says what to do."""
