"""A dataset through methods: records that survive a kill."""
