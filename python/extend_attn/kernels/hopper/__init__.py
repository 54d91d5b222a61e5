"""The kernels for Hopper (sm_90), in Gluon; imported when a plan asks for one, because older Tritons have no Gluon."""
