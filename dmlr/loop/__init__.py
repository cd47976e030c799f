"""The method: rewards, injection, the loop of Algorithm 1, and its oracle."""
