//! How far a departure is, for whoever watches it.

use super::Run;
use crate::engine::meter::per_second;
use crate::telemetry::{Phase, Progress};

impl Run {
    pub(super) fn show(&mut self, change: impl FnOnce(&mut Progress)) {
        let convergence = self.machine.convergence();
        let total = self.ram.layout().bytes();
        let elapsed = self.started.elapsed().as_secs_f64();
        let sent = self.meter.pages() * crate::types::PAGE_BYTES as u64;
        let wire = self.meter.frame_bytes();
        let owed = self
            .tracker
            .as_ref()
            .map_or(total, |tracker| (tracker.owed_pages() + tracker.in_flight_pages()) * crate::types::PAGE_BYTES as u64);
        let mut next = Progress::new(self.order.migration);
        next.phase = self.phase;
        next.round = self.round.round.0;
        next.memory_total_bytes = total;
        next.memory_sent_bytes = sent;
        next.memory_remaining_bytes = owed;
        next.wire_bytes = wire;
        next.elapsed_seconds = elapsed;
        next.dirty_bytes_per_second = convergence.dirty_bytes_per_second();
        next.send_bytes_per_second = convergence.send_bytes_per_second().unwrap_or_default();
        next.wire_bytes_per_second = per_second(wire, elapsed);
        next.expected_downtime_seconds = convergence.downtime_expected().map(|d| d.as_secs_f64());
        next.phase_fraction = if self.phase == Phase::Memory && total > 0 { (sent as f64 / total as f64).min(1.0) } else { 0.0 };
        let rate = if next.send_bytes_per_second > 0 { next.send_bytes_per_second } else { per_second(sent, elapsed) };
        next.eta_seconds = (rate > 0 && self.phase == Phase::Memory).then(|| owed as f64 / rate as f64);
        change(&mut next);
        self.progress.send_replace(next);
    }
}
