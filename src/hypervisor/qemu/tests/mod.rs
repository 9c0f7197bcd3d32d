//! The monitor's client against a fake QEMU that misbehaves, and the driver against a real one.

mod hostile;
mod real;
