"""The parts of launch/simulate-cluster. Standard library only: it runs before dtrain is installed."""
