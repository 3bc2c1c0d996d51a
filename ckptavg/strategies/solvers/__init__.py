"""The optimisers of SeWA and TWA, on an objective alone; they load torch, which the strategies' own modules do not."""
