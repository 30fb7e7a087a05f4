"""Does it fit, in memory and in time, on devices that need not be here."""
