"""From readings to a budget: policies, the pure step, events, and the governor that ties them to an engine."""
