//! `graft plot`: the curves of training runs, from their metrics.jsonl.

use crate::args::PlotArgs;
use crate::errors::Usage;
use crate::report::{self, As, Chart, Series};
use crate::ui;
use anyhow::{Context, Result, anyhow, bail};
use graft_train::read_rows;
use resvg::{tiny_skia, usvg};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pixels of a PNG for each unit of the SVG.
const SCALE: f32 = 2.0;

/// The lines of one metrics.jsonl.
pub(crate) struct Metrics {
    train: Vec<Value>,
    valid: Vec<Value>,
}

impl Metrics {
    /// The metrics of an adapter directory, or the file itself.
    fn file(run: &Path) -> PathBuf {
        if run.is_dir() { run.join("metrics.jsonl") } else { run.to_path_buf() }
    }

    /// Reads the metrics of an adapter directory, or the file itself.
    pub(crate) fn read(run: &Path) -> Result<Self> {
        let file = Self::file(run);
        let advice = "give an adapter directory of `graft lora` or its metrics.jsonl";
        if !file.is_file() {
            bail!("{}: there is no such file: {advice}", file.display());
        }
        let (mut train, mut valid) = (Vec::new(), Vec::new());
        for row in read_rows(&file)? {
            let value = Value::from(row.value);
            let kept = match value["kind"].as_str() {
                Some("train") => &mut train,
                Some("valid") => &mut valid,
                // A later graft may write more.
                Some(_) => continue,
                None => {
                    bail!("{}:{}: expected an object with \"kind\", found none", file.display(), row.line)
                }
            };
            if !value["iter"].is_number() {
                bail!("{}:{}: expected a number as \"iter\", found none: {advice}", file.display(), row.line);
            }
            kept.push(value);
        }
        if train.is_empty() && valid.is_empty() {
            bail!("{}: it holds no reports of a run", file.display());
        }
        Ok(Self { train, valid })
    }

    /// A quantity of the training reports by iteration.
    pub(crate) fn train(&self, key: &str) -> Vec<(f64, f64)> {
        points(&self.train, key)
    }

    /// A quantity of the validations by iteration.
    pub(crate) fn valid(&self, key: &str) -> Vec<(f64, f64)> {
        points(&self.valid, key)
    }
}

/// JSON has no number for what is not finite and says `null`: that stays a point, or an earlier one would pass for the
/// last.
fn points(lines: &[Value], key: &str) -> Vec<(f64, f64)> {
    let value = |line: &Value| line.get(key).map(|v| v.as_f64().unwrap_or(f64::NAN));
    lines.iter().filter_map(|line| Some((line["iter"].as_f64()?, value(line)?))).collect()
}

/// Draws all runs into each of the files.
pub(crate) fn plot(args: &PlotArgs) -> Result<()> {
    let form = |file: &str| {
        PathBuf::from(file).extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase()
    };
    if let Some(file) = args.output.iter().find(|file| !["html", "svg", "png"].contains(&form(file).as_str()))
    {
        bail!(Usage(format!("--output {file}: its name must end in .html, .svg or .png")));
    }
    let inputs: Vec<PathBuf> = args.runs.iter().map(|run| Metrics::file(Path::new(run))).collect();
    report::check(&args.output.iter().map(|file| ("--output", file)).collect::<Vec<_>>(), &inputs)?;
    let mut runs = Vec::new();
    for run in &args.runs {
        runs.push((run.clone(), Metrics::read(Path::new(run))?));
    }
    let charts = charts(&runs);
    let head = ["run", "iterations", "loss", "validation", "not finite", "tokens/s"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (name, metrics) in &runs {
        let last = |points: &[(f64, f64)]| points.last().copied();
        let shown = |point: Option<(f64, f64)>| As::Decimal.show(&json!(point.map(|p| p.1)));
        let (losses, valids) = (metrics.train("loss"), metrics.valid("loss"));
        let (loss, valid) = (last(&losses), last(&valids));
        let lost = losses.iter().chain(&valids).filter(|p| !p.1.is_finite()).count().to_string();
        let done = loss.into_iter().chain(valid).map(|p| p.0).fold(0.0, f64::max);
        let speeds = metrics.train("tokens_per_second").into_iter().map(|p| p.1);
        let speeds: Vec<f64> = speeds.filter(|speed| speed.is_finite()).collect();
        let speed = graft_train::quantile(&speeds, 0.5).map_or_else(|| "–".into(), |s| format!("{s:.1}"));
        rows.push(vec![name.clone(), format!("{done}"), shown(loss), shown(valid), lost, speed]);
    }
    for file in &args.output {
        match form(file).as_str() {
            "html" => report::write(file, &report::runs(&charts, &rows))?,
            "svg" => report::write(file, &report::picture(&charts))?,
            _ => report::write_bytes(file, &png(&report::picture(&charts))?)?,
        }
    }
    ui::out(&ui::table(&rows));
    Ok(())
}

/// Loss, learning rate, norm of the gradient and speed.
fn charts(runs: &[(String, Metrics)]) -> Vec<Chart> {
    let of = |suffix: &str, points: &dyn Fn(&Metrics) -> Vec<(f64, f64)>| {
        let series =
            runs.iter().map(|(name, m)| Series { name: format!("{name}{suffix}"), points: points(m) });
        series.filter(|s| s.points.iter().any(|p| p.1.is_finite())).collect::<Vec<_>>()
    };
    let chart = |title: &str, series| Chart { title: title.into(), x: "iteration", series, log_x: false };
    let mut loss = of("", &|m| m.train("loss"));
    loss.extend(of(", validation", &|m| m.valid("loss")));
    vec![
        chart("Loss", loss),
        chart("Learning rate", of("", &|m| m.train("learning_rate"))),
        chart("Norm of the gradient", of("", &|m| m.train("grad_norm"))),
        chart("Trained tokens per second", of("", &|m| m.train("tokens_per_second"))),
    ]
}

/// An SVG file as PNG. The font comes along, since a server may have none.
fn png(svg: &str) -> Result<Vec<u8>> {
    let mut options = usvg::Options::default();
    let fonts = Arc::make_mut(&mut options.fontdb);
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    fonts.set_sans_serif_family("Ubuntu");
    let tree = usvg::Tree::from_str(svg, &options).context("the picture could not be drawn")?;
    let size = tree.size().to_int_size().scale_by(SCALE).ok_or_else(|| anyhow!("the picture has no size"))?;
    let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height())
        .ok_or_else(|| anyhow!("there is no memory for a picture of {}x{}", size.width(), size.height()))?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().context("the picture could not be written as PNG")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_value_that_is_not_finite_is_not_replaced_by_an_earlier_one() {
        let lines =
            ["{\"iter\": 1, \"loss\": 2.5}", "{\"iter\": 2, \"loss\": null}", "{\"iter\": 3, \"tokens\": 1}"];
        let lines: Vec<Value> = lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let found = points(&lines, "loss");
        assert_eq!((found.len(), found[0]), (2, (1.0, 2.5)));
        assert!(found[1].0 == 2.0 && found[1].1.is_nan());
    }
}
