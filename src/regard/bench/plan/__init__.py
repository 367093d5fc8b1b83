"""What spreading a sequence over ranks will take: a roofline from measured rates, and measurements beside it."""
