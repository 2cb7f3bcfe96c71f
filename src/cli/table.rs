//! Columns for people: what the `list` commands print.

use crate::clock;

use std::fmt;

/// Rows under a head, each column as wide as its widest text.
pub struct Table<const COLUMNS: usize>(Vec<[String; COLUMNS]>);

impl<const COLUMNS: usize> Table<COLUMNS> {
    pub fn new(head: [&str; COLUMNS]) -> Self {
        Self(vec![head.map(str::to_owned)])
    }

    pub fn row(&mut self, row: [String; COLUMNS]) {
        self.0.push(row);
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| self.0.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        for row in &self.0 {
            let cells = row.iter().enumerate();
            let line: String = cells
                .map(|(column, cell)| format!("{cell:<width$}  ", width = width(column)))
                .collect();
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A time as people read it, in UTC.
pub fn date(at_ms: Option<i64>) -> String {
    at_ms.map_or_else(
        || "-".to_owned(),
        |at_ms| humantime::format_rfc3339_seconds(clock::writable(at_ms)).to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let mut table = Table::new(["ID", "NAME"]);
        table.row(["12345".to_owned(), "añ".to_owned()]);
        table.row(["1".to_owned(), date(Some(0))]);
        assert_eq!(
            table.to_string(),
            "ID     NAME\n12345  añ\n1      1970-01-01T00:00:00Z\n"
        );
        assert_eq!(date(None), "-");
    }
}
