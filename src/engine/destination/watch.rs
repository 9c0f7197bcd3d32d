//! Whether the source still lives and leads on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::meter::Meter;
use crate::limits;

/// When the source was last heard, and when it last led on.
pub(in crate::engine) struct Watch {
    pub(in crate::engine) meter: Arc<Meter>,
    bytes: u64,
    pub(in crate::engine) heard: Instant,
    pub(in crate::engine) led_on: Instant,
}

impl Default for Watch {
    fn default() -> Self {
        let now = Instant::now();
        Self { meter: Arc::default(), bytes: 0, heard: now, led_on: now }
    }
}

impl Watch {
    /// What is missing, if it has been for too long.
    pub(in crate::engine) fn look(&mut self) -> Option<(&'static str, Duration)> {
        let (now, bytes) = (Instant::now(), self.meter.frame_bytes());
        if bytes != self.bytes {
            (self.bytes, self.heard, self.led_on) = (bytes, now, now);
        }
        if now - self.led_on > limits::STALL_MAX {
            return Some(("pages or a step", limits::STALL_MAX));
        }
        (now - self.heard > limits::SILENCE_MAX).then_some(("a sign of life", limits::SILENCE_MAX))
    }
}
