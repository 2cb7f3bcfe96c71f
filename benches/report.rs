//! Samples to tables: medians with their range, and ratios between neighbours in time.
//!
//! Filled by `scenarios`, read by `goals`, printed by `main` as Markdown that goes into docs/performance.md as it is.

use std::collections::{BTreeMap, BTreeSet};

/// What was sampled: a step of a scenario and a figure.
type Place = (String, &'static str, &'static str);

#[derive(Default)]
pub struct Report {
    /// By round, so that ratios are between neighbours in time.
    samples: BTreeMap<Place, BTreeMap<usize, f64>>,
    /// Steps and servers whose content came back wrong.
    corrupt: BTreeSet<(String, &'static str)>,
    /// In the order in which they came up first.
    steps: Vec<Step>,
    /// What servers failed in: a line each.
    pub failures: Vec<String>,
}

struct Step {
    name: String,
    servers: Vec<&'static str>,
    /// The first one is what the step is about.
    figures: Vec<&'static str>,
}

/// One server in one round, to write samples into.
pub struct Cell<'a> {
    pub report: &'a mut Report,
    pub round: usize,
    pub server: &'static str,
}

impl Cell<'_> {
    pub fn add(&mut self, step: &str, figure: &'static str, value: f64) {
        let steps = &mut self.report.steps;
        let index = steps.iter().position(|known| known.name == step).unwrap_or_else(|| {
            steps.push(Step {
                name: step.to_owned(),
                servers: Vec::new(),
                figures: Vec::new(),
            });
            steps.len() - 1
        });
        if !steps[index].servers.contains(&self.server) {
            steps[index].servers.push(self.server);
        }
        if !steps[index].figures.contains(&figure) {
            steps[index].figures.push(figure);
        }
        let place = (step.to_owned(), self.server, figure);
        self.report.samples.entry(place).or_default().insert(self.round, value);
    }

    /// What came back is not what was sent.
    pub fn corrupt(&mut self, step: &str) {
        self.report.corrupt.insert((step.to_owned(), self.server));
    }
}

impl Report {
    fn rounds(&self, step: &str, server: &'static str, figure: &'static str) -> Option<&BTreeMap<usize, f64>> {
        self.samples.get(&(step.to_owned(), server, figure))
    }

    /// The median over the rounds.
    pub fn median(&self, step: &str, server: &'static str, figure: &'static str) -> Option<f64> {
        median(self.rounds(step, server, figure)?.values().copied().collect())
    }

    /// The median of what `combine` makes of two samples of the same round.
    pub fn paired(
        &self,
        (step, server, figure): (&str, &'static str, &'static str),
        (other_step, other_server, other_figure): (&str, &'static str, &'static str),
        combine: impl Fn(f64, f64) -> f64,
    ) -> Option<f64> {
        let others = self.rounds(other_step, other_server, other_figure)?;
        let own = self.rounds(step, server, figure)?;
        median(
            own.iter()
                .filter_map(|(round, value)| Some(combine(*value, *others.get(round)?)))
                .collect(),
        )
    }

    pub fn is_corrupt(&self, step: &str, server: &'static str) -> bool {
        self.corrupt.contains(&(step.to_owned(), server))
    }

    /// Servers and steps with wrong content.
    pub fn corrupted(&self) -> impl Iterator<Item = &(String, &'static str)> {
        self.corrupt.iter()
    }

    /// A table per step; `order` is that of the servers.
    pub fn tables(&self, order: &[&'static str]) -> String {
        let mut text = String::new();
        for Step { name, servers, figures } in &self.steps {
            let base = ["nginx", "floor-discard"]
                .into_iter()
                .find(|base| servers.contains(base));
            let ratio = base.map(|base| format!(" × {base} |")).unwrap_or_default();
            text += &format!("\n### {name}\n\n| server | {} |{ratio}\n", figures.join(" | "));
            text += &format!("|---|{}\n", "--:|".repeat(figures.len() + usize::from(base.is_some())));
            for &server in order.iter().filter(|server| servers.contains(server)) {
                let mark = if self.is_corrupt(name, server) {
                    " **CORRUPT**"
                } else {
                    ""
                };
                text += &format!("| {server}{mark} |");
                for figure in figures {
                    text += &format!(
                        " {} |",
                        self.rounds(name, server, figure).map(range).unwrap_or_default()
                    );
                }
                if let Some(base) = base {
                    let place = |server: &'static str| (name.as_str(), server, figures[0]);
                    let ratio = self.paired(place(server), place(base), |own, other| own / other);
                    text += &format!(" {} |", ratio.map(number).unwrap_or_default());
                }
                text.push('\n');
            }
        }
        text
    }

    /// What failed, if anything did.
    pub fn failures(&self) -> String {
        if self.failures.is_empty() {
            return String::new();
        }
        let lines: String = self.failures.iter().map(|failure| format!("- {failure}\n")).collect();
        format!(
            "\n### Failed\n\nWhat these would have measured is missing above, and the goals go without it:\n\n{lines}"
        )
    }
}

/// Median, and the range in which it lies.
fn range(samples: &BTreeMap<usize, f64>) -> String {
    let values: Vec<_> = samples.values().copied().collect();
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(*value), high.max(*value))
    });
    let median = median(values).map(number).unwrap_or_default();
    if samples.len() < 2 {
        median
    } else {
        format!("{median} [{}..{}]", number(low), number(high))
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(*values.get(middle.checked_sub(1)?)?, values[middle])
    })
}

/// Three digits that count.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 || size == 0.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}
