//! Seeded randomness: the same seed gives the same numbers on every machine.

use std::env;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Splitmix64 (Steele, Lea, Flood 2014): small, and good from any seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that begins at `seed`.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// A generator for one place in a run (such as connection 3, request 7): what is drawn there does not
    /// depend on which thread came first.
    pub fn at(seed: u64, place: &[u64]) -> Self {
        let start = place.iter().fold(seed, |state, part| {
            Rng(state ^ part.wrapping_mul(0xD6E8_FEB8_6659_FD93)).next_u64()
        });
        Rng(start)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number from 0 up to and without `bound` (0 for the bound 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        self.next_u64() % bound
    }

    /// A number from 0.0 up to and without 1.0.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with the probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// A duration of up to `max`.
    pub fn up_to(&mut self, max: Duration) -> Duration {
        max.mul_f64(self.unit())
    }
}

/// The seed of a run: `FAULT_SEED` where it is set, else one from the clock. The test prints it.
pub fn seed() -> u64 {
    match env::var("FAULT_SEED") {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("FAULT_SEED={text:?} is no number")),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 % 1_000_000_000,
    }
}
