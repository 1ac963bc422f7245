//! Columns as docker aligns them: at least ten wide, three blanks apart, the last one as long as it is.

/// Least width of a column, its blanks included.
const WIDTH_MIN: usize = 10;
/// Blanks between the longest cell and the next column.
const PADDING: usize = 3;

/// Aligns lines whose cells end with a tab.
pub(crate) fn align(text: &str) -> String {
    aligned(text, WIDTH_MIN)
}

/// As [`align`], with another least width.
pub(crate) fn aligned(text: &str, width_min: usize) -> String {
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    let mut widths = Vec::new();
    for row in &rows {
        for (column, cell) in row.iter().take(row.len() - 1).enumerate() {
            let width = (cell.chars().count() + PADDING).max(width_min);
            match widths.get_mut(column) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut out = String::with_capacity(text.len() * 2);
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            out.push_str(cell);
            if column + 1 < row.len() {
                let blanks = widths[column].saturating_sub(cell.chars().count());
                out.extend(std::iter::repeat_n(' ', blanks));
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_ten_wide_at_least_and_the_last_is_as_long_as_it_is() {
        let table = align("ID\tA LONG HEADER\tNAMES\n0123456789ab\tx\tyü\n");
        assert_eq!(table, "ID             A LONG HEADER   NAMES\n0123456789ab   x               yü\n");
        assert_eq!(align("A\tB\n"), "A         B\n");
        assert_eq!(align(""), "");
    }
}
