"""Facts about cards and their libraries, each with its source."""
