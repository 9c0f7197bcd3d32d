//! Random choices that can be repeated: a test prints its seed, and `SEALANE_SEED` gives it back.

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }
}

/// A number from the environment.
pub fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().unwrap())
}

/// What the runs of a test are to make durable before the switch, by `SEALANE_DURABILITIES`.
pub fn durabilities() -> Vec<String> {
    let names = std::env::var("SEALANE_DURABILITIES").unwrap_or_else(|_| "none".to_owned());
    names.split(',').map(str::to_owned).collect()
}
