//! What a terminal shows: data on stdout, progress on stderr, a live line only where someone can see it.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};

/// A line of data on stdout.
pub(crate) fn out(text: &str) {
    print(text);
    print("\n");
}

/// Data on stdout, at once. A reader that went away (`| head`) ends the process quietly.
pub(crate) fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        crate::host::exit(0);
    }
}

/// A line on stderr; that nobody reads it is no error.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// One live line on stderr with plain lines above it. Where stderr is no terminal only the plain lines appear.
pub(crate) struct Progress {
    bar: ProgressBar,
    shown: bool,
}

impl Progress {
    /// A line for `total` steps.
    pub(crate) fn new(total: u64, what: &str) -> Self {
        let shown = std::io::stderr().is_terminal();
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = if std::env::var_os("NO_COLOR").is_some() {
            "{prefix} {pos}/{len} [{bar:24}] {msg} eta {eta}"
        } else {
            "{prefix:.bold} {pos}/{len} [{bar:24.cyan}] {msg} eta {eta}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what.to_string());
        Self { bar, shown }
    }

    /// Moves the line.
    pub(crate) fn at(&self, position: u64, message: String) {
        self.bar.set_message(message);
        self.bar.set_position(position);
    }

    /// Sets where the line begins, so that the time left counts from here.
    pub(crate) fn start(&self, position: u64) {
        self.bar.set_position(position);
        self.bar.reset_eta();
    }

    /// Moves a line whose length was not known at its start.
    pub(crate) fn of(&self, position: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(position);
    }

    /// A plain line that stays.
    pub(crate) fn line(&self, text: &str) {
        if self.shown {
            self.bar.suspend(|| note(text));
        } else {
            note(text);
        }
    }

    /// Removes the live line.
    pub(crate) fn done(&self) {
        self.bar.finish_and_clear();
    }
}

/// A curve of at most `width` block characters, the least value lowest; several values share a character by their mean.
pub(crate) fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    if finite.is_empty() || width == 0 {
        return String::new();
    }
    let count = finite.len().min(width);
    let means: Vec<f64> = (0..count)
        .map(|i| {
            let part = &finite[i * finite.len() / count..(i + 1) * finite.len() / count];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect();
    let (low, high) = means.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let step = (high - low).max(f64::MIN_POSITIVE);
    means.iter().map(|v| BLOCKS[(((v - low) / step) * 7.0).round().clamp(0.0, 7.0) as usize]).collect()
}

/// A text whose line ends can be seen, and whose control characters and marks of direction do nothing: they would show
/// it otherwise than the model reads it.
pub(crate) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out += "↵\n",
            c if graft_train::is_invisible(c) => out.extend(c.escape_unicode()),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Rows in aligned columns: the first to the left, the others to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|v| v.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(i, (v, w))| if i == 0 { format!("{v:<w$}") } else { format!("{v:>w$}") });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Bytes for people: 1234567 -> `1.2 MB`.
pub(crate) fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_curve_falls() {
        assert_eq!(sparkline(&[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8), "█▇▆▅▄▃▂▁");
        assert_eq!(sparkline(&[4.0, 4.0, 1.0, 1.0], 2), "█▁");
        assert_eq!(sparkline(&[1.0, 1.0], 8), "▁▁");
        assert_eq!(sparkline(&[f64::NAN], 8), "");
    }

    #[test]
    fn nothing_of_a_text_is_hidden() {
        assert_eq!(
            visible("a\nb\u{1b}[2J\u{202e}\u{61c}\u{200b}\u{200d}\u{feff}é한"),
            "a↵\nb\\u{1b}[2J\\u{202e}\\u{61c}\\u{200b}\\u{200d}\\u{feff}é한"
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "10".into()], vec!["bbb".into(), "7".into()]];
        assert_eq!(table(&rows), "a    10\nbbb   7");
    }
}
