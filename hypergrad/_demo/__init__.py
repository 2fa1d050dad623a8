"""The demo: three tasks on data that scikit-learn ships, through the public interface alone."""
