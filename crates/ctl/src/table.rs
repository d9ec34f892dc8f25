//! Columns for people.

/// A line each, in columns as wide as they must be; nothing of it moves the terminal.
pub fn table<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> String {
    let heads = heads.map(str::to_owned);
    let rows: Vec<_> = std::iter::once(&heads)
        .chain(rows)
        .map(|row| row.each_ref().map(|cell| printable(cell)))
        .collect();
    let widths: Vec<_> = (0..N)
        .map(|n| rows.iter().map(|row| row[n].chars().count()).max())
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:<width$}  ", width = width.unwrap_or_default()))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Names are whatever clients and containers say, and the terminal is root's.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be_and_show_no_control_characters() {
        let rows = [
            ["a".to_owned(), "long\x1b[2Jer".to_owned()],
            ["bcd".to_owned(), String::new()],
        ];
        let expected = "X    Y\na    long\u{fffd}[2Jer\nbcd\n";
        assert_eq!(table(["X", "Y"], &rows), expected);
    }
}
