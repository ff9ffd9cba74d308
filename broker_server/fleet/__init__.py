"""The fleet: who belongs to it, what certifies that, and what it is told beside its work. Needs the extra [fleet]."""
