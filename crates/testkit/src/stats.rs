//! Summaries of samples.

use serde::Serialize;

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    pub n: usize,
    pub median: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let max = *sorted.last()?;
        let median = if n % 2 == 1 {
            sorted[n / 2]
        } else {
            f64::midpoint(sorted[n / 2 - 1], sorted[n / 2])
        };
        // Nearest rank: the smallest sample that so many percent of the samples do not exceed.
        let percentile = |percent: usize| sorted[(n * percent).div_ceil(100).max(1) - 1];
        Some(Self {
            n,
            median,
            p95: percentile(95),
            p99: percentile(99),
            max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_samples() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let summary = Summary::of(&samples).unwrap();
        assert_eq!((summary.n, summary.median, summary.max), (100, 50.5, 100.0));
        assert_eq!((summary.p95, summary.p99), (95.0, 99.0));
        assert_eq!(Summary::of(&[3.0]).unwrap().p95, 3.0);
        assert!(Summary::of(&[]).is_none());
    }
}
