"""How servers of other projects run compressed models."""
