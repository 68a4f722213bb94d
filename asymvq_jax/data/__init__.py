"""Pictures and masks: sources, LaMa's random masks, and the Grain pipeline that makes batches of both."""
