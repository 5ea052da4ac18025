"""The Kalman rule: Bayesian linear regression of the feedback score, user by user, with a meta-learned prior."""
