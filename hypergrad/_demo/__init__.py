"""The demo: three tasks on data that scikit-learn ships, using only the public interface."""
