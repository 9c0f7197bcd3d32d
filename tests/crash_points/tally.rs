//! What came of the runs.

use std::collections::BTreeSet;
use std::fmt;

/// One run.
#[derive(Debug)]
pub struct Run {
    pub point: &'static str,
    pub reached: bool,
    pub kills: u64,
    pub moved: bool,
    pub in_doubt: bool,
    pub violation: Option<String>,
}

impl Run {
    pub fn new(point: &'static str) -> Self {
        Self { point, reached: false, kills: 0, moved: false, in_doubt: false, violation: None }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (reached, moved) = (if self.reached { "reached" } else { "not reached" }, if self.moved { "moved" } else { "stayed" });
        write!(f, "{reached}, {} kills, {}", self.kills, self.violation.as_deref().unwrap_or(moved))?;
        if self.in_doubt { write!(f, ", was in doubt") } else { Ok(()) }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Tally {
    points: BTreeSet<&'static str>,
    runs: u64,
    kills: u64,
    moved: u64,
    stayed: u64,
    in_doubt: u64,
    pub violations: Vec<String>,
}

impl Tally {
    pub fn add(&mut self, name: &str, run: &Run) {
        self.runs += 1;
        self.kills += run.kills;
        self.in_doubt += u64::from(run.in_doubt);
        match &run.violation {
            Some(why) => self.violations.push(format!("{name}: {why}")),
            None if run.moved => self.moved += 1,
            None => self.stayed += 1,
        }
        if run.reached {
            self.points.insert(run.point);
        }
    }

    /// Points that no run came by.
    pub fn never_reached(&self, of: &[&'static str]) -> Vec<&'static str> {
        of.iter().copied().filter(|point| !self.points.contains(point)).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { points, runs, kills, moved, stayed, in_doubt, violations } = self;
        let (points, violations) = (points.len(), violations.len());
        write!(
            f,
            "crash points: {points} points, {runs} runs, {kills} kills, moved {moved}, stayed {stayed}, in doubt {in_doubt}, violations {violations}"
        )
    }
}
