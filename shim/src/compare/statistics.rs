//! What can be said of repeated measurements: the middle, how sure it is, and which of several are too close to call.

use serde::Serialize;

/// Repeated measurements of one thing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// In the order of size.
    values: Vec<f64>,
}

/// What is left of a sample in a table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the values are below.
    pub median: f64,
    /// Where the true median lies in 95 of 100 cases.
    pub from: f64,
    /// The other end of it.
    pub to: f64,
    /// The least value.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Sample {
    /// Of these values; what is no number is left out.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Sample {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        Sample { values }
    }

    /// The values in the order of size.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Nothing of an empty sample.
    pub fn summary(&self) -> Option<Summary> {
        let (least, most) = (*self.values.first()?, *self.values.last()?);
        let count = self.values.len() as f64;
        // The number of values below the median is binomial, so these ranks enclose it whatever the distribution.
        let reach = 1.96 * count.sqrt() / 2.0;
        let low = (count / 2.0 - reach).floor().max(1.0) as usize;
        let high = (count / 2.0 + 1.0 + reach).ceil().min(count) as usize;
        Some(Summary {
            median: self.median(),
            from: self.values[low - 1],
            to: self.values[high - 1],
            least,
            most,
        })
    }

    fn median(&self) -> f64 {
        let middle = self.values.len() / 2;
        match self.values.len() % 2 {
            1 => self.values[middle],
            _ => f64::midpoint(self.values[middle - 1], self.values[middle]),
        }
    }
}

/// The place of each, from 1 for the smallest median. Those whose medians cannot be told apart from that of the first of
/// their place share it. What was not measured has none.
pub fn ranks(summaries: &[Option<Summary>]) -> Vec<Option<usize>> {
    let mut order: Vec<_> =
        summaries.iter().enumerate().filter_map(|(index, summary)| Some((index, (*summary)?))).collect();
    order.sort_by(|(_, one), (_, other)| one.median.total_cmp(&other.median));
    let mut ranks = vec![None; summaries.len()];
    let mut leader: Option<(usize, Summary)> = None;
    for (place, (index, summary)) in (1..).zip(order) {
        let rank = match leader {
            Some((rank, first)) if summary.from <= first.to => rank,
            _ => {
                leader = Some((place, summary));
                place
            }
        };
        ranks[index] = Some(rank);
    }
    ranks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn summary(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
        Sample::new(values).summary()
    }

    #[test]
    fn the_middle_and_its_bounds() {
        let twenty = summary((1..=20).map(f64::from)).unwrap();
        assert_eq!((twenty.median, twenty.least, twenty.most), (10.5, 1.0, 20.0));
        assert_eq!((twenty.from, twenty.to), (5.0, 16.0));
        assert_eq!(summary([3.0]).unwrap().median, 3.0);
        assert_eq!(summary([f64::NAN, f64::INFINITY]), None);
    }

    #[test]
    fn what_overlaps_shares_a_place() {
        let close = [summary((10..30).map(f64::from)), summary((100..120).map(f64::from)), None];
        assert_eq!(ranks(&close), [Some(1), Some(2), None]);
        let noisy =
            [summary((12..32).map(f64::from)), summary((10..30).map(f64::from)), summary([500.0; 20])];
        assert_eq!(ranks(&noisy), [Some(1), Some(1), Some(3)]);
        assert_eq!(
            ranks(&[summary([2.0]), summary([1.0])]),
            [Some(2), Some(1)],
            "one each says little, but says it"
        );
    }

    proptest! {
        #[test]
        fn the_median_lies_within_its_bounds(values in prop::collection::vec(0.0..1e9, 1..200)) {
            let summary = summary(values).unwrap();
            prop_assert!(summary.least <= summary.from && summary.from <= summary.median);
            prop_assert!(summary.median <= summary.to && summary.to <= summary.most);
        }
    }
}
