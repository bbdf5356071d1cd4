"""Who may: the right answer, fast, also when OpenMeter is away."""
