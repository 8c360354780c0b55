//! Curves and bars as SVG. A series is told from the others by its dashes and marks, so colour is never needed.
//!
//! Series draw in `currentColor`: a page gives each a colour by its class, a picture by an attribute.

use std::fmt::Write as _;

/// Colours of the series where no page decides.
const COLOURS: [&str; 6] = ["#0063a6", "#c04a00", "#00775a", "#a8407f", "#7a6200", "#444c56"];
const DASHES: [&str; 6] = ["", "7 4", "2 3", "10 3 2 3", "14 5", "4 2"];

/// A named curve.
#[derive(Debug, Clone, Default)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// By x.
    pub(crate) points: Vec<(f64, f64)>,
}

/// Curves over a common x.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) series: Vec<Series>,
    /// x is drawn by its logarithm.
    pub(crate) log_x: bool,
}

/// `&`, `<`, `>` and `"` as HTML and SVG want them.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A name of at most `most` characters. Its end is kept, since paths differ there.
fn shortened(name: &str, most: usize) -> String {
    let count = name.chars().count();
    match count > most {
        true => std::iter::once('…').chain(name.chars().skip(count + 1 - most)).collect(),
        false => name.to_owned(),
    }
}

/// Steps of 1, 2 or 5 times a power of ten within `low..high`, about `count` of them but none below `least`, and how the
/// axis shows each.
fn ticks(low: f64, high: f64, count: usize, least: f64) -> Vec<(f64, String)> {
    let rough = (high - low) / count as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    let step = step.max(least);
    let first = (low / step).ceil() as i64;
    let all = (first..).map(|i| i as f64 * step).take_while(|t| *t <= high + step * 1e-9);
    all.map(|t| (t, short(t, step))).collect()
}

/// A number as an axis shows it, with the digits that tell it from one that is `step` away.
fn short(value: f64, step: f64) -> String {
    // A power of ten that came out a little low is that power all the same.
    let power = |v: f64| (v.abs().log10() + 1e-9).floor() as i32;
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    match value.abs() {
        0.0 => "0".into(),
        a if (1e-3..1e5).contains(&a) => {
            trimmed(&format!("{value:.*}", (-power(step)).clamp(0, 17) as usize))
        }
        _ => {
            let text = format!("{value:.*e}", (power(value) - power(step)).clamp(0, 17) as usize);
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{}e{exponent}", trimmed(digits))
        }
    }
}

/// The least and the greatest of some numbers, a little apart where they are the same.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let apart = (low.abs() * 0.05).max(1e-9);
    match low.total_cmp(&high) {
        std::cmp::Ordering::Less => Some((low, high)),
        std::cmp::Ordering::Equal => Some((low - apart, high + apart)),
        std::cmp::Ordering::Greater => None,
    }
}

/// A mark of series `index` at a place. There are five, one less than dashes, so that both repeat together only after 30.
fn mark(index: usize, x: f64, y: f64) -> String {
    let path = match index % 5 {
        0 => return format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"currentColor\"/>"),
        1 => "m-3.5-3.5h7v7h-7z",
        2 => "m0-4.5 4.5 8h-9z",
        3 => "m0-5 5 5-5 5-5-5z",
        _ => "m-1-5h2v4h4v2h-4v4h-2v-4h-4v-2h4z",
    };
    format!("<path d=\"M{x:.1} {y:.1}{path}\" fill=\"currentColor\"/>")
}

/// What opens the group of series `index`.
fn group(index: usize) -> String {
    let index = index % 6;
    format!("<g class=\"s{index}\" color=\"{}\">", COLOURS[index])
}

/// A line of series `index` through places.
fn line(index: usize, places: &str) -> String {
    format!(
        "<polyline points=\"{places}\" fill=\"none\" stroke=\"currentColor\" stroke-width=\"2\" stroke-dasharray=\"{}\" \
         stroke-linejoin=\"round\"/>",
        if DASHES[index % 6].is_empty() { "none" } else { DASHES[index % 6] }
    )
}

impl Chart {
    fn text(&self, x: f64, y: f64, anchor: &str, class: &str, text: &str) -> String {
        format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>",
            escape(text)
        )
    }

    /// The legend, in as many lines as it takes: where each series' entry starts, its base line, and the name, shortened
    /// to a line.
    fn legend(&self, width: f64) -> Vec<(f64, f64, String)> {
        // A letter is about 7 wide.
        const SAMPLE: f64 = 46.0;
        let most = ((width - SAMPLE) / 7.0) as usize;
        let (mut x, mut y) = (0.0, 14.0);
        let entry = |series: &Series| {
            let name = shortened(&series.name, most);
            let wide = SAMPLE + 7.0 * name.chars().count() as f64;
            if x > 0.0 && x + wide > width {
                (x, y) = (0.0, y + 18.0);
            }
            let place = (x, y, name);
            x += wide;
            place
        };
        self.series.iter().map(entry).collect()
    }

    /// What the legend needs beyond its first line, so that the curves keep their height.
    fn extra(&self, width: f64) -> f64 {
        self.legend(width).last().map_or(0.0, |entry| entry.1 - 14.0)
    }

    /// What stands inside the SVG element; `width` and `height` are its units.
    pub(crate) fn inside(&self, width: f64, height: f64) -> String {
        let mut out = String::new();
        let legend = self.extra(width) + 14.0;
        for (index, (x, y, name)) in self.legend(width).into_iter().enumerate() {
            let sample = format!("{x:.1},{0:.1} {1:.1},{0:.1}", y - 4.0, x + 28.0);
            let _ = write!(
                out,
                "{}{}{}</g>{}",
                group(index),
                line(index, &sample),
                mark(index, x + 14.0, y - 4.0),
                self.text(x + 34.0, y, "start", "", &name)
            );
        }
        let along = |x: f64| if self.log_x { x.max(f64::MIN_POSITIVE).log10() } else { x };
        let all = || self.series.iter().flat_map(|s| &s.points);
        let (Some((x0, x1)), Some((y0, y1))) = (range(all().map(|p| along(p.0))), range(all().map(|p| p.1)))
        else {
            return out + &self.text(width / 2.0, height / 2.0, "middle", "soft", "no values");
        };
        let (left, right, top, bottom) = (52.0, width - 10.0, legend + 14.0, height - 36.0);
        let px = |x: f64| left + (along(x) - x0) / (x1 - x0) * (right - left);
        let py = |y: f64| bottom - (y - y0) / (y1 - y0) * (bottom - top);
        for (y, label) in ticks(y0, y1, 5, 0.0) {
            let _ = write!(
                out,
                "<path d=\"M{left:.1} {0:.1}H{right:.1}\" class=\"grid\" stroke=\"#d0d7de\"/>{1}",
                py(y),
                self.text(left - 6.0, py(y) + 4.0, "end", "soft", &label)
            );
        }
        let marks: Vec<(f64, String)> = if self.log_x {
            // To three digits: these are the values that were tried.
            let label = |p: &(f64, f64)| (p.0, short(p.0, p.0 / 100.0));
            self.series.first().map(|s| s.points.iter().map(label).collect()).unwrap_or_default()
        } else {
            // Steps and weights are whole.
            ticks(x0, x1, if width < 400.0 { 5 } else { 8 }, 1.0)
        };
        for (x, label) in marks {
            out += &self.text(px(x), bottom + 16.0, "middle", "soft", &label);
        }
        out += &self.text((left + right) / 2.0, height - 4.0, "middle", "soft", self.x);
        for (index, series) in self.series.iter().enumerate() {
            out += &group(index);
            // A curve ends where a value is not finite, and goes on behind it; a cross says where.
            for part in series.points.split(|p| !p.1.is_finite()).filter(|part| !part.is_empty()) {
                let text: Vec<String> =
                    part.iter().map(|p| format!("{:.2},{:.2}", px(p.0), py(p.1))).collect();
                out += &line(index, &text.join(" "));
                if part.len() == 1 && series.points.len() > 1 {
                    out += &mark(index, px(part[0].0), py(part[0].1));
                }
            }
            for (x, _) in series.points.iter().filter(|p| !p.1.is_finite()) {
                let (x, y) = (px(*x) - 4.0, top + 1.0);
                out += &format!(
                    "<path d=\"M{x:.1} {y:.1}l8 8m0-8l-8 8\" stroke=\"currentColor\" stroke-width=\"2\"/>"
                );
            }
            // Some marks are enough to tell a curve; those of different series stand at different places.
            let places: Vec<(f64, f64)> =
                series.points.iter().filter(|p| p.1.is_finite()).map(|p| (px(p.0), py(p.1))).collect();
            let every = places.len().div_ceil(8).max(1);
            for (x, y) in places.iter().skip(index * every / 3 % every).step_by(every) {
                out += &mark(index, *x, *y);
            }
            out += "</g>";
        }
        out
    }

    /// As SVG elements for a page: one as wide as a phone, one for wider screens.
    pub(crate) fn figure(&self) -> String {
        let names: Vec<&str> = self.series.iter().map(|s| s.name.as_str()).collect();
        let label = escape(&format!("{}: {}", self.title, names.join(", ")));
        let svg = |class: &str, width: f64, height: f64| {
            let height = height + self.extra(width);
            format!(
                "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\" \
                 font-family=\"system-ui, sans-serif\" font-size=\"12\">{}</svg>",
                self.inside(width, height)
            )
        };
        format!(
            "<figure><figcaption>{}</figcaption>{}{}</figure>",
            escape(&self.title),
            svg("desk", 560.0, 300.0),
            svg("phone", 350.0, 270.0)
        )
    }
}

/// Several charts, two beside each other, as one SVG file.
pub(crate) fn picture(charts: &[Chart]) -> String {
    const WIDTH: f64 = 560.0;
    let each = 320.0 + charts.iter().map(|chart| chart.extra(WIDTH)).fold(0.0, f64::max);
    let rows = charts.len().div_ceil(2) as f64;
    let (width, height) = (WIDTH * 2.0 + 60.0, rows * (each + 20.0) + 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"Ubuntu, system-ui, sans-serif\" font-size=\"12\" fill=\"#1b1f24\">\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
    );
    for (index, chart) in charts.iter().enumerate() {
        let (x, y) = (20.0 + (index % 2) as f64 * (WIDTH + 20.0), 20.0 + (index / 2) as f64 * (each + 20.0));
        let _ = write!(
            out,
            "<g transform=\"translate({x} {y})\"><text y=\"12\" font-size=\"14\" font-weight=\"bold\">{}</text>\
             <g transform=\"translate(0 20)\">{}</g></g>",
            escape(&chart.title),
            chart.inside(WIDTH, each - 20.0)
        );
    }
    out + "</svg>\n"
}

/// Numbers from 0 as bars with the ends of their intervals; `full` (1 for shares) or the greatest is the whole width.
pub(crate) fn bars(title: &str, items: &[(String, f64, Option<[f64; 2]>)], full: f64) -> String {
    let end =
        |(_, value, ends): &(String, f64, Option<[f64; 2]>)| ends.map_or(*value, |ends| ends[1].max(*value));
    let most = items.iter().map(end).fold(full.max(f64::MIN_POSITIVE), f64::max);
    let svg = |class: &str, width: f64| {
        let mut out = String::new();
        for (index, item) in items.iter().enumerate() {
            let (y, at) = (44.0 * index as f64, |v: f64| v.max(0.0) / most * (width - 70.0));
            // A letter is about 7 wide.
            let name = escape(&shortened(&item.0, (width / 7.0) as usize));
            let _ = write!(
                out,
                "<text y=\"{:.1}\">{name}</text>{}<rect y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"currentColor\" \
                 fill-opacity=\"0.55\"/>",
                y + 14.0,
                group(index),
                y + 20.0,
                at(item.1)
            );
            if let Some([low, high]) = item.2 {
                let (low, high, y) = (at(low), at(high), y + 22.0);
                let _ = write!(
                    out,
                    "<path d=\"M{low:.1} {y:.1}v10m0-5H{high:.1}m0-5v10\" stroke=\"currentColor\" stroke-width=\"2\" \
                     fill=\"none\"/>"
                );
            }
            let (x, y) = (at(end(item)) + 8.0, y + 31.0);
            let _ = write!(out, "</g><text x=\"{x:.1}\" y=\"{y:.1}\">{:.3}</text>", item.1);
        }
        let height = 44.0 * items.len() as f64;
        format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\" font-size=\"12\">{out}</svg>",
            escape(title)
        )
    };
    format!(
        "<figure><figcaption>{}</figcaption>{}{}</figure>",
        escape(title),
        svg("desk", 560.0),
        svg("phone", 350.0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers() {
        let labels = |low, high| ticks(low, high, 5, 0.0).into_iter().map(|t| t.1).collect::<Vec<_>>();
        assert_eq!(labels(0.0, 50.0), ["0", "10", "20", "30", "40", "50"]);
        assert_eq!(labels(0.0, 2e-4), ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]);
        assert_eq!(ticks(0.13, 0.92, 4, 0.0).len(), 4);
        // There is no iteration 1.5.
        let whole: Vec<String> = ticks(1.0, 3.0, 8, 1.0).into_iter().map(|t| t.1).collect();
        assert_eq!(whole, ["1", "2", "3"]);
        let rates = [2.5e-4, 1.25e-4, 3e-4 / 7.0, 0.0025, 12.5].map(|v| short(v, v / 100.0));
        assert_eq!(rates, ["2.5e-4", "1.25e-4", "4.29e-5", "0.0025", "12.5"]);
    }

    #[test]
    fn no_two_ticks_have_the_same_label() {
        for (low, high) in [(5e-5, 2e-4), (9.5e-6, 1.05e-5), (1e5, 1.6e5), (2.30001, 2.30004), (-3.0, 4e5)] {
            let labels: Vec<String> = ticks(low, high, 5, 0.0).into_iter().map(|t| t.1).collect();
            let distinct: std::collections::BTreeSet<&String> = labels.iter().collect();
            assert!(labels.len() > 1 && distinct.len() == labels.len(), "{low} to {high}: {labels:?}");
        }
    }

    #[test]
    fn a_curve_goes_through_its_points_and_breaks_where_there_is_no_number() {
        let series =
            |name: &str, points: &[(f64, f64)]| Series { name: name.into(), points: points.to_vec() };
        let chart = Chart {
            title: "a < b".into(),
            series: vec![
                series("one", &[(0.0, 1.0), (5.0, 3.0), (6.0, f64::NAN), (8.0, 3.0), (10.0, 1.0)]),
                series("two", &[(0.0, 2.0), (10.0, 2.0)]),
            ],
            ..Chart::default()
        };
        let text = chart.inside(560.0, 300.0);
        // y falls as values rise: 1 at the bottom (264), 3 at the top (28), 2 between them.
        assert!(text.contains("points=\"52.00,264.00 301.00,28.00\""), "{text}");
        assert!(text.contains("points=\"450.40,28.00 550.00,264.00\""), "{text}");
        assert!(text.contains("M346.8 29.0l8 8m0-8l-8 8"), "{text}");
        assert!(text.contains("points=\"52.00,146.00 550.00,146.00\""), "{text}");
        assert!(text.contains("stroke-dasharray=\"7 4\"") && chart.figure().contains("a &lt; b"));
        let empty = Chart { series: vec![Series::default()], ..Chart::default() };
        assert!(empty.inside(560.0, 300.0).contains("no values"));
    }

    #[test]
    fn every_series_of_many_is_seen_and_told_from_the_others() {
        let one = |i: usize| Series { name: format!("run{i}"), points: vec![(1.0, i as f64)] };
        let chart = Chart { series: (0..12).map(one).collect(), ..Chart::default() };
        let text = chart.inside(560.0, 300.0);
        // Each has a mark in the legend and one at its point.
        assert_eq!(text.matches("fill=\"currentColor\"").count(), 24, "{text}");
        let look = |i: usize| (line(i, ""), mark(i, 0.0, 0.0));
        assert!((0..30).all(|a| (0..a).all(|b| look(a) != look(b))));
        // Names of 4 and 5 letters are 74 and 81 wide.
        assert!(chart.extra(560.0) == 18.0 && chart.extra(350.0) == 36.0);
        assert!(chart.figure().contains("0 0 560 318"), "the legend takes the curves' room");
        let name = format!("{}/the-run", "long/".repeat(40));
        let chart = Chart { series: vec![Series { name, points: vec![] }], ..Chart::default() };
        let (_, _, name) = &chart.legend(350.0)[0];
        assert!(name.starts_with('…') && name.ends_with("/the-run") && name.chars().count() == 43, "{name}");
        let item = |end: &str| (format!("{}/{end}", "long/".repeat(40)), 0.25, None);
        let page = bars("Score", &[item("one"), item("two")], 1.0);
        // Half of the names' ends are seen at each width, and a quarter of the width is 0.25.
        assert_eq!((page.matches("/one</text>").count(), page.matches("/two</text>").count()), (2, 2));
        assert!(page.contains("width=\"122.5\"") && page.contains("width=\"70.0\""), "{page}");
    }
}
