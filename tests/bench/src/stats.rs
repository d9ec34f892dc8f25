//! The table that people read.

pub use gantry_testkit::stats::Summary;

/// `figure` of the runtime under test as a fraction of the peer's, for people.
pub fn ratio(figure: f64, peer: f64) -> String {
    if peer > 0.0 {
        format!("{:.2}", figure / peer)
    } else {
        "-".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_ratio_to_nothing() {
        assert_eq!(ratio(1.0, 0.0), "-");
        assert_eq!(ratio(1.0, 4.0), "0.25");
    }
}
