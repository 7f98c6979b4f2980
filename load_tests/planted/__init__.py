"""Documents with facts planted in prose, for measuring what is found again."""
