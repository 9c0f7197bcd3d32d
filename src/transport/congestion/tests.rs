use std::time::Duration;

use super::path::{Path, Simulation};
use super::*;
use crate::types::LaneIndex;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// 50 ms and a queue as long.
const LONG: Path = Path { mbit: 100, rtt: ms(50), queue: ms(50), lost: 0, policed: false };

/// One flow for 3 s after one to find the rate; how full the path is, in percent.
fn filled(path: Path) -> f64 {
    let mut simulation = Simulation::new(path);
    simulation.add(Duration::ZERO);
    simulation.run(ms(1000));
    100.0 * simulation.run(ms(3000))[0] / path.mbit as f64
}

#[test]
fn a_lossy_long_path_is_kept_full() {
    for (mbit, lost, least) in [(100, 0, 97.0), (100, 10, 97.0), (100, 100, 95.0), (100, 200, 90.0), (1000, 10, 97.0), (1000, 100, 95.0)] {
        let filled = filled(Path { mbit, lost, ..LONG });
        assert!(filled > least, "{mbit} Mbit/s, {lost} of 10000 lost: {filled:.1} % full");
    }
}

#[test]
fn short_and_very_long_paths_are_kept_full() {
    for (mbit, rtt, queue) in [(10, 10, 100), (1000, 1, 10), (100, 200, 50), (20, 300, 100)] {
        let path = Path { mbit, rtt: ms(rtt), queue: ms(queue), ..LONG };
        let mut simulation = Simulation::new(path);
        simulation.add(Duration::ZERO);
        simulation.run(ms(4000));
        let filled = 100.0 * simulation.run(ms(4000))[0] / mbit as f64;
        assert!(filled > 93.0, "{mbit} Mbit/s over {rtt} ms: {filled:.1} % full");
    }
}

#[test]
fn the_rate_is_found_within_a_second() {
    let mut simulation = Simulation::new(Path { mbit: 1000, ..LONG });
    simulation.add(Duration::ZERO);
    let first = simulation.run(ms(1000))[0];
    assert!(first > 500.0, "{first:.0} Mbit/s in the first second");
}

#[test]
fn the_queue_stays_short() {
    let mut simulation = Simulation::new(Path { queue: ms(500), ..LONG });
    simulation.add(Duration::ZERO);
    simulation.run(ms(2000));
    simulation.longest_queue = Duration::ZERO;
    simulation.run(ms(20_000));
    assert!(simulation.longest_queue < ms(35), "{:?}", simulation.longest_queue);
}

#[test]
fn two_flows_share_fairly() {
    for (late, lost) in [(0, 0), (3000, 0), (0, 100), (3000, 100)] {
        let mut simulation = Simulation::new(Path { lost, ..LONG });
        simulation.add(Duration::ZERO);
        simulation.add(ms(late));
        simulation.run(ms(late + 15_000));
        let rates = simulation.run(ms(10_000));
        assert!(rates.iter().sum::<f64>() > 93.0, "{rates:?}");
        assert!(rates.iter().all(|rate| (30.0..70.0).contains(rate)), "second {late} ms later, {lost} of 10000 lost: {rates:?}");
    }
}

/// Lanes are opened one after the other, and the first fills the path meanwhile.
#[test]
fn lanes_of_one_session_soon_share_evenly() {
    for (mbit, lost) in [(100, 0), (100, 100), (1000, 10)] {
        let mut simulation = Simulation::new(Path { mbit, lost, ..LONG });
        let group = Arc::<Group>::default();
        for lane in 0..4 {
            simulation.add_member(ms(150 * u64::from(lane)), Some(group.join(LaneIndex(lane))));
        }
        simulation.run(ms(2500));
        let rates = simulation.run(ms(1500));
        let mean = rates.iter().sum::<f64>() / 4.0;
        assert!(mean * 4.0 > 0.9 * mbit as f64, "{rates:?}");
        assert!(rates.iter().all(|rate| (0.7..1.4).contains(&(rate / mean))), "{lost} of 10000 lost: {rates:?}");
    }
}

#[test]
fn a_lane_that_is_gone_or_idle_counts_no_more() {
    let group = Arc::<Group>::default();
    let [first, second, third] = [0, 1, 2].map(|lane| group.join(LaneIndex(lane)));
    assert_eq!(first.fair(100), 100);
    first.tell(100);
    second.tell(130);
    third.tell(0);
    assert_eq!(first.fair(100), 115);
    drop(second);
    assert_eq!(first.fair(100), 100);
    third.tell(100_000);
    assert_eq!(first.fair(100), 150, "the path of the other lane may be another one");
}

#[test]
fn more_and_less_room_is_noticed() {
    let mut simulation = Simulation::new(LONG);
    simulation.add(Duration::ZERO);
    simulation.run(ms(2000));
    simulation.path.mbit = 300;
    simulation.run(ms(2000));
    let more = simulation.run(ms(1000))[0];
    assert!(more > 270.0, "{more:.0} of 300 Mbit/s");
    simulation.path.mbit = 50;
    simulation.run(ms(2000));
    let lost = simulation.flows[0].lost;
    let less = simulation.run(ms(2000))[0];
    assert!(less > 45.0, "{less:.0} of 50 Mbit/s");
    assert!(simulation.flows[0].lost - lost < 50, "{} packets lost", simulation.flows[0].lost - lost);
}

#[test]
fn a_policed_rate_is_not_exceeded_for_long() {
    let mut simulation = Simulation::new(Path { policed: true, ..LONG });
    simulation.add(Duration::ZERO);
    simulation.run(ms(3000));
    let (lost, delivered) = (simulation.flows[0].lost, simulation.flows[0].delivered);
    simulation.run(ms(5000));
    let lost = (simulation.flows[0].lost - lost) * path::PACKET;
    let delivered = simulation.flows[0].delivered - delivered;
    assert!(lost * 100 < delivered * 8, "{lost} bytes lost, {delivered} delivered");
    assert!(delivered * 8 > 5 * 70_000_000, "{delivered} bytes delivered");
}

#[test]
fn a_pause_of_the_application_does_not_lower_the_rate() {
    let mut simulation = Simulation::new(LONG);
    let flow = simulation.add(Duration::ZERO);
    simulation.run(ms(2000));
    let before = simulation.flows[flow].control.rate.best();
    simulation.flows[flow].bursts = Some((20_000, ms(100)));
    simulation.run(ms(20_000));
    let after = simulation.flows[flow].control.rate.best();
    assert!(after >= before / 10 * 9, "{before} and then {after} bytes/s");
}

#[test]
fn a_sender_without_a_processor_does_not_lower_the_rate() {
    let mut simulation = Simulation::new(Path { mbit: 500, ..LONG });
    let flow = simulation.add(Duration::ZERO);
    simulation.run(ms(2000));
    let before = simulation.flows[flow].control.rate.best();
    simulation.flows[flow].busy = ms(9);
    simulation.run(ms(2000));
    let starved = simulation.run(ms(8000))[0];
    assert!(starved < 250.0, "{starved:.0} Mbit/s: it is not starved");
    let after = simulation.flows[flow].control.rate.best();
    assert!(after >= before / 10 * 8, "{before} and then {after} bytes/s");
    simulation.flows[flow].busy = Duration::ZERO;
    simulation.run(ms(200));
    let again = simulation.run(ms(500))[0];
    assert!(again > 450.0, "{again:.0} of 500 Mbit/s at once");
}

#[test]
fn persistent_congestion_starts_again() {
    let mut simulation = Simulation::new(LONG);
    simulation.add(Duration::ZERO);
    simulation.run(ms(2000));
    let now = simulation.now;
    let control = &mut simulation.flows[0].control;
    assert!(control.window() > 500_000);
    control.on_congestion_event(now, now, true, 100_000);
    assert_eq!(control.window(), control.initial_window());
    simulation.run(ms(1000));
    assert!(simulation.run(ms(1000))[0] > 90.0);
}

#[test]
fn a_mark_lowers_the_window_and_its_end_raises_it() {
    let mut simulation = Simulation::new(LONG);
    simulation.add(Duration::ZERO);
    simulation.run(ms(2000));
    let (now, before) = (simulation.now, simulation.flows[0].control.window());
    simulation.flows[0].control.on_congestion_event(now, now, false, 0);
    simulation.run(ms(60));
    assert!(simulation.flows[0].control.ceiling.is_some() || simulation.flows[0].control.window() < before);
    simulation.run(ms(2000));
    assert_eq!(simulation.flows[0].control.ceiling, None);
}

#[test]
fn the_window_stays_within_its_bounds() {
    let now = Instant::now();
    let least = RateFactory { initial_window: 1 << 20, least_window: 1 << 20, member: None };
    let mut control = RateControl::new(least, now, 1200);
    for n in 1..2000u64 {
        let at = now + ms(n);
        control.on_sent(at, 1200, n);
        control.on_congestion_event(at, at, n % 100 == 0, 1_000_000);
        control.arrived(at + ms(1), at, 10);
        control.on_end_acks(at + ms(1), 0, false, Some(n));
        assert!((1 << 20..=WINDOW_MAX).contains(&control.window()), "{}", control.window());
    }
    let mut control = RateControl::new(RateFactory { initial_window: 64 * 1024, least_window: 0, member: None }, now, 6500);
    for n in 1..2000u64 {
        let at = now + ms(n);
        control.on_sent(at, 1 << 40, n);
        control.arrived(at + Duration::from_micros(1), at, 1 << 40);
        control.on_end_acks(at + Duration::from_micros(1), 0, false, Some(n));
        assert!((8 * 6500..=WINDOW_MAX).contains(&control.window()), "{}", control.window());
    }
}

#[test]
fn snapshots_are_bounded() {
    let now = Instant::now();
    let mut delivery = Delivery::new(now);
    for n in 0..100_000 {
        delivery.sent(now + Duration::from_micros(n), Duration::ZERO);
    }
    assert!(delivery.sample(now + ms(200), now, Duration::ZERO).is_none(), "its snapshot is gone");
    assert!(delivery.sample(now + ms(200), now + ms(99), Duration::ZERO).is_none());
    assert!(delivery.sample(now + ms(200), now + ms(100), Duration::ZERO).is_some());
}
