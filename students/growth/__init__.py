"""Growth and narrowing: function-preserving changes of a student's size."""
