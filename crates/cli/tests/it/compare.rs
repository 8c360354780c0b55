//! `graft compare` and `graft plot`: the legs differ only in what they should, and a page says what its JSON does.

use std::io::{BufRead, BufReader};

use serde_json::{Value, json};

use crate::setting::{Folder, llama, row};

/// What a page shows at each place of the JSON.
fn shown(page: &str) -> Vec<(String, String)> {
    let cells = page.split("data-at=\"").skip(1);
    cells
        .map(|cell| {
            let (at, rest) = cell.split_once("\">").unwrap();
            (at.to_owned(), rest.split_once('<').unwrap().0.to_owned())
        })
        .collect()
}

/// Whether a text of the page is that number, to the digits that it shows.
fn is(text: &str, value: &Value) -> bool {
    let Some(number) = value.as_f64() else {
        return text == value.as_str().unwrap_or("–");
    };
    let digits: String = text.chars().take_while(|c| "+-.e0123456789".contains(*c)).collect();
    let unit = match text[digits.len()..].trim() {
        "" | "x" | "B" => 1.0,
        "ms" => 1e-3,
        "%" => 1e-2,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        other => panic!("{other:?} in {text}"),
    };
    let decimals = digits.split('e').next().unwrap().split('.').nth(1).map_or(0, str::len) as i32;
    let power = digits.split('e').nth(1).map_or(0, |p| p.parse::<i32>().unwrap());
    let half = 0.5001 * 10_f64.powi(power - decimals) * unit;
    (digits.parse::<f64>().unwrap() * unit - number).abs() <= half
}

/// The points of the curves of the chart of that title.
fn curves(page: &str, title: &str) -> Vec<Vec<(f64, f64)>> {
    let figure = page.split("<figcaption>").find(|part| part.starts_with(title)).unwrap();
    let desk = figure.split("<svg").nth(1).unwrap();
    let lines = desk.split("points=\"").skip(1).map(|part| part.split('"').next().unwrap());
    let point = |text: &str| {
        let (x, y) = text.split_once(',').unwrap();
        (x.parse().unwrap(), y.parse().unwrap())
    };
    // The legend has a line of two points for each series.
    let all: Vec<Vec<(f64, f64)>> = lines.map(|line| line.split(' ').map(point).collect()).collect();
    all[all.len() / 2..].to_vec()
}

#[test]
fn legs_differ_in_their_bases_and_kinds_alone_and_the_page_equals_the_json() {
    let folder = Folder::new();
    folder.model("model", &llama(None));
    folder
        .rows("data/test.jsonl", &(0..5).map(|i| row(&format!("hello {i}"), "the user")).collect::<Vec<_>>());
    let flags = "compare --model model --data data --iters 6 --batch-size 2 --rank 4 --q-group-size 32 --seed 3 \
                 --learning-rate 1e-2 --seeds 2 --metric exact --max-tokens 4";
    let run = folder.ok(flags);
    let report = folder.json("compare/compare.json");
    assert_eq!((&report["schema"], &report["same_batches"]), (&json!(1), &json!(true)));
    assert_eq!(
        (&report["complete"], &report["missing"], &report["seeds"]),
        (&json!(true), &json!([]), &json!(2))
    );
    let notes = ["Training lora seed-3 (1 of 6)", "Training qdora seed-4 (6 of 6)", "Scoring qlora seed-3"];
    assert!(notes.iter().all(|note| run.err.lines().any(|line| line == *note)), "{run:?}");
    assert_eq!(report["bases"]["packed"]["from"], "model, quantized: 4 bits, groups of 32");
    let legs = report["legs"].as_array().unwrap();
    let of = |key: &str| legs.iter().map(|leg| leg[key].clone()).collect::<Vec<Value>>();
    assert_eq!(of("name"), ["lora", "qlora", "qdora"]);
    assert_eq!(of("fine_tune_type"), ["lora", "lora", "dora"]);
    assert_eq!(of("seeds"), [json!([3, 4]), json!([3, 4]), json!([3, 4])]);
    assert!(legs[0]["base_bytes"].as_u64() > legs[1]["base_bytes"].as_u64());
    assert!(legs[1]["adapter_bytes"].as_u64() < legs[2]["adapter_bytes"].as_u64());
    assert!(legs.iter().all(|leg| leg["curve"]["iter"] == json!([1, 2, 3, 4, 5, 6])), "{report}");
    assert!(legs.iter().all(|leg| leg["score"].is_number() && leg["valid_loss_interval"][1].is_number()));
    assert_eq!(legs[2]["against"]["leg"], "qlora");
    // Both are wrong in all rows, which says nothing of others.
    assert!(legs[2]["against"]["score"] == 0.0 && legs[2]["against"]["score_interval"].is_null());
    let sentences = report["sentences"].as_array().unwrap();
    assert_eq!(sentences.len(), 2);
    assert!(
        run.out.contains(sentences[1].as_str().unwrap())
            && run.out.contains("qdora instead of qlora (2 seeds)")
    );
    // QDoRA starts as QLoRA does: m is the row norm, B is 0.
    assert_eq!(legs[1]["valid_curve"]["value"][0], legs[2]["valid_curve"]["value"][0]);

    let page = String::from_utf8(folder.read("compare/compare.html")).unwrap();
    let cells = shown(&page);
    assert!(cells.len() > 60, "{}", cells.len());
    for (at, text) in cells {
        let value = report.pointer(&at).unwrap_or_else(|| panic!("{at} is not in compare.json"));
        assert!(is(&text, value), "{at}: the page says {text}, compare.json {value}");
    }
    for sentence in sentences {
        assert!(page.contains(sentence.as_str().unwrap()));
    }
    let scale =
        |value: f64, (a, b): (f64, f64), (from, to): (f64, f64)| from + (value - a) / (b - a) * (to - from);
    for (title, key) in [("Training loss", "curve"), ("Validation loss", "valid_curve")] {
        let drawn = curves(&page, title);
        let numbers = |leg: &Value| {
            leg[key]["value"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>()
        };
        let all: Vec<Vec<f64>> = legs.iter().map(numbers).collect();
        let ends =
            |pick: fn(f64, f64) -> f64, of: &dyn Fn() -> Vec<f64>| of().into_iter().reduce(pick).unwrap();
        let values = || all.concat();
        let places = || drawn.iter().flatten().map(|p| p.1).collect::<Vec<f64>>();
        let (low, high) = (ends(f64::min, &values), ends(f64::max, &values));
        // y points down.
        let (bottom, top) = (ends(f64::max, &places), ends(f64::min, &places));
        assert_eq!(drawn.len(), 3);
        for (points, values) in drawn.iter().zip(&all) {
            assert_eq!(points.len(), values.len());
            for (point, value) in points.iter().zip(values) {
                assert!((point.1 - scale(*value, (low, high), (bottom, top))).abs() < 0.02, "{title}");
            }
        }
    }
    let asks = ["http://", "https://", "src=", "@import", "url("];
    assert!(asks.iter().all(|part| !page.contains(part)), "the page asks for something");
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("stroke-dasharray"));

    let plot =
        folder.ok("plot compare/lora/seed-3 compare/qdora/seed-3/metrics.jsonl -o a.html -o a.svg -o a.png");
    assert!(plot.out.contains("compare/lora/seed-3"), "{plot:?}");
    assert!(folder.read("a.png").starts_with(b"\x89PNG") && folder.read("a.svg").starts_with(b"<svg"));
    folder.fails(2, "plot compare/lora/seed-3 -o a.jpg", &["must end in .html, .svg or .png"]);
    folder.fails(2, "plot compare/lora/seed-3 -o gone/a.svg", &["in a directory that exists"]);
    folder.fails(1, "plot data", &["data/metrics.jsonl", "adapter directory"]);
    let metrics = "compare/lora/seed-3/metrics.jsonl";
    std::fs::copy(folder.path(metrics), folder.path("m.html")).unwrap();
    folder.fails(2, "plot m.html -o m.html", &["--output m.html: that is the data"]);
    folder.write("odd.jsonl", "{\"kind\": \"train\", \"loss\": 1}\n");
    folder.fails(1, "plot odd.jsonl", &["odd.jsonl:1: expected a number as \"iter\""]);
    folder.write("odd.jsonl", "{\"kind\": \"train\", \"iter\": 1}\n{\"kind\" 1}\n");
    let error = folder.fails(1, "plot odd.jsonl", &["odd.jsonl:2: not valid JSON", "at column 9"]);
    assert!(!error.contains("line 1"), "{error}");
    let lines = [(1, "2.5"), (2, "null"), (3, "5e30")]
        .map(|(iter, loss)| format!("{{\"kind\": \"train\", \"iter\": {iter}, \"loss\": {loss}}}"));
    folder.write("odd.jsonl", &lines.join("\n"));
    let table = folder.ok("plot odd.jsonl").out;
    let cells: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(cells, ["odd.jsonl", "3", "5.0000e30", "–", "1", "–"], "{table}");
    folder.fails(1, "plot data/train.jsonl", &["data/train.jsonl:1: expected an object with \"kind\""]);
    folder.fails(2, flags, &["--output compare exists already"]);
}

#[test]
fn all_legs_start_with_the_same_a_whatever_their_base() {
    let folder = Folder::new();
    folder.model("model", &llama(None));
    folder.ok("quantize --hf-path model --mlx-path packed --q-group-size 32");
    let start = |name: &str, flags: &str| {
        folder.ok(&format!("train --data data --rank 4 --seed 5 --iters 0 --adapter-path {name} {flags}"));
        let bytes = folder.read(&format!("{name}/adapters.safetensors"));
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let names: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let tensors = names.as_object().unwrap().iter().filter(|(name, _)| name.ends_with(".lora_a"));
        let data = |value: &Value| {
            let at = |i: usize| 8 + header + value["data_offsets"][i].as_u64().unwrap() as usize;
            bytes[at(0)..at(1)].to_vec()
        };
        tensors.map(|(name, value)| (name.clone(), data(value))).collect::<std::collections::BTreeMap<_, _>>()
    };
    let lora = start("a", "--model model");
    assert_eq!(lora.len(), 14);
    assert!(lora == start("b", "--model packed"));
    assert!(lora == start("c", "--model packed --fine-tune-type dora"));
    assert!(lora != start("d", "--model model --seed 6"));
}

#[test]
fn a_packed_model_is_dequantized_rates_are_found_and_legs_may_be_files() {
    let folder = Folder::with_model();
    folder.write("small.yaml", "lora_parameters: {rank: 2}\n");
    let schedule = "lr_schedule: {name: step_decay, arguments: [0.001, 0.5, 2]}";
    folder.write("big.yaml", &format!("lora_parameters: {{rank: 6}}\nfine_tune_type: dora\n{schedule}\n"));
    let flags = "compare --model model --data data --iters 3 --batch-size 2";
    let run = folder.ok(&format!(
        "{flags} --legs lora,qlora --find-lr 1e-3,1e-2,1e30 --optimizer sgd --max-grad-norm 0 --output a"
    ));
    let said: Vec<&str> =
        run.err.lines().filter(|line| line.starts_with("Trying ") || line.starts_with("  ")).collect();
    // The legs take turns, so that each one's settings are tried before long.
    let tried = |i: usize| said[2 * i];
    assert_eq!(
        (said.len(), tried(0), tried(1)),
        (12, "Trying lora at 1e-3 (1 of 6)", "Trying qlora at 1e-3 (2 of 6)")
    );
    assert!(said[1].starts_with("  loss ") && said[11] == "  it blew up", "{said:?}");
    assert!(!folder.names("a/lora").contains(&"lr-1e30".to_owned()), "{:?}", folder.names("a/lora"));
    let report = folder.json("a/compare.json");
    assert_eq!(report["bases"]["dense"]["from"], "model, dequantized");
    for leg in report["legs"].as_array().unwrap() {
        let sweep = leg["sweep"].as_array().unwrap();
        assert!(sweep.len() == 3 && sweep[2]["loss"].is_null(), "{leg}");
        let best = sweep[..2]
            .iter()
            .min_by(|a, b| a["loss"].as_f64().unwrap().total_cmp(&b["loss"].as_f64().unwrap()));
        assert_eq!(leg["learning_rate"], best.unwrap()["learning_rate"]);
    }
    folder.ok(&format!("{flags} --leg small.yaml --leg big.yaml --output b"));
    let report = folder.json("b/compare.json");
    let legs = &report["legs"];
    assert_eq!((&legs[0]["name"], &legs[1]["name"]), (&json!("small"), &json!("big")));
    assert_eq!(
        (&legs[1]["lora_parameters"]["rank"], &legs[1]["fine_tune_type"]),
        (&json!(6), &json!("dora"))
    );
    assert!(legs[0]["learning_rate"].is_number() && legs[1]["learning_rate"].is_null());
    assert_eq!(legs[1]["against"]["leg"], "small");
    // There are two pairs of steps.
    assert!(legs[1]["against"]["step_ratio_interval"].is_null());
    assert!(report["sentences"][0].as_str().unwrap().contains("too few steps for an interval"));
    assert!(report["bases"]["dense"].is_null() && !folder.names("b").contains(&"bases".to_owned()));
}

#[test]
fn a_comparison_that_cannot_be_made_is_refused_before_anything_is_written() {
    let folder = Folder::with_model();
    let flags = "compare --model model --data data --batch-size 2";
    folder.fails(2, &format!("{flags} --q-bits 4"), &["model is packed already"]);
    folder.fails(2, &format!("{flags} --fine-tune-type dora"), &["--legs decides that"]);
    folder.fails(2, &format!("{flags} --adapter-path x"), &["--adapter-path", "--output"]);
    folder.fails(2, &format!("{flags} --iters 0"), &["--iters must be at least 1"]);
    folder.fails(2, &format!("{flags} --seeds 0"), &["--seeds must be at least 1"]);
    folder.fails(2, &format!("{flags} --rank 0"), &["lora_parameters.rank must be at least 1"]);
    folder.fails(2, &format!("{flags} --find-lr -1"), &["must be above 0"]);
    folder.fails(2, "compare --model model", &["--data is required"]);
    folder.fails(2, &format!("{flags} --pattern a"), &["--pattern belongs to --metric regex"]);
    folder.fails(1, &format!("{flags} --metric json"), &["data/test.jsonl:1: the answer", "is not JSON"]);
    folder.write("named.yaml", "text_feature: q\n");
    folder.fails(2, &format!("{flags} -c named.yaml --metric loss"), &["text_feature: --metric reads"]);
    folder.copy("data", "bare");
    folder.write("bare/test.jsonl", "\n");
    let bare = "compare --model model --data bare --batch-size 2 --metric";
    folder.fails(1, &format!("{bare} exact"), &["bare/test.jsonl: the file has no rows to measure"]);
    folder.write("bare/test.jsonl", "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}\n");
    folder.fails(1, &format!("{bare} exact"), &["bare/test.jsonl:1: there is no message before the answer"]);
    // Bad rows show before a base is made.
    folder.write("bare/valid.jsonl", "{\"text\": 1}\n");
    let bare = "compare --model model --data bare --batch-size";
    folder.fails(1, &format!("{bare} 2"), &["bare/valid.jsonl:1: \"text\": expected a string"]);
    folder.write("bare/valid.jsonl", "");
    folder.fails(1, &format!("{bare} 9"), &["bare/train.jsonl: 8 usable rows, but batch_size is 9"]);
    folder.write("named.yaml", "prompt_feature: q\n");
    folder.fails(2, &format!("{flags} -c named.yaml --metric exact"), &["prompt_feature: --metric reads"]);
    folder.fails(1, "compare --model model --data gone", &["there is no data directory `gone`"]);
    folder.fails(1, "compare --model gone --data data", &["there is no model directory `gone`"]);
    folder.fails(1, &format!("{flags} --leg gone.yaml"), &["cannot read the settings file gone.yaml"]);
    folder.write("qlora.yaml", "{}\n");
    folder.fails(2, &format!("{flags} --legs qlora --leg qlora.yaml"), &["two legs are called qlora"]);
    folder.write("odd.yaml", "adapter_path: x\n");
    folder.fails(2, &format!("{flags} --leg odd.yaml"), &["--adapter-path", "--output"]);
    folder.write("odd.yaml", "seed: 5\n");
    folder.fails(2, &format!("{flags} --leg odd.yaml"), &["seed: all legs have the same"]);
    folder.fails(2, &format!("{flags} --legs lora,dora --q-bits 4"), &["no such leg is compared"]);
    folder.write("odd.yaml", "iters: soon\n");
    folder.fails(2, &format!("{flags} --leg odd.yaml"), &["leg odd: `iters` must be a whole number"]);
}

#[test]
fn warnings_are_said_once_and_flags_that_are_refused_are_not_offered() {
    let folder = Folder::with_model();
    folder.rows("data/train.jsonl", &[row("a", "b"), row("a", "b")]);
    let run =
        folder.ok("compare --model model --data data --legs lora,dora --iters 1 --batch-size 1 --seeds 2");
    assert_eq!(run.err.matches("duplicate: ").count(), 1, "{run:?}");
    let help = folder.ok("compare --help").out;
    for flag in ["--test ", "--resume ", "--adapter-path ", "--steps-per-report ", "--fine-tune-type "] {
        assert!(!help.contains(flag), "{flag}");
    }
    assert!(help.contains("--learning-rate ") && help.contains("--find-lr "));
}

#[test]
fn an_interrupted_comparison_says_what_it_lacks_and_compares_what_it_has() {
    let folder = Folder::with_model();
    folder.write("short.yaml", "{}\n");
    folder.write("other.yaml", "fine_tune_type: dora\n");
    folder.write("long.yaml", "iters: 1000000\n");
    let flags = "compare --model model --data data --iters 2 --batch-size 2 --seeds 2";
    // Ctrl-C as soon as that line is there.
    let stopped = |flags: &str, at: &str| {
        let mut running = folder.start(flags);
        let mut lines = BufReader::new(running.0.stderr.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().starts_with(at)), "{at}");
        running.interrupt();
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        let run = running.end();
        assert!(
            run.status == Some(130) && rest.iter().any(|line| line.contains("what is done so far")),
            "{rest:?}"
        );
    };
    stopped(
        &format!("{flags} --leg short.yaml --leg other.yaml --leg long.yaml --output a"),
        "Training long seed-0 (3 of 6)",
    );
    let report = folder.json("a/compare.json");
    let legs = report["legs"].as_array().unwrap();
    assert_eq!((legs.len(), &report["complete"], &report["seeds"]), (2, &json!(false), &json!(1)));
    let missing = [("short", json!([1])), ("other", json!([1])), ("long", json!([0, 1]))];
    let missing = missing.map(|(leg, runs)| json!({"leg": leg, "runs": runs, "scores": []}));
    assert_eq!(report["missing"], json!(missing));
    let page = String::from_utf8(folder.read("a/compare.html")).unwrap();
    assert!(page.contains("Not complete") && page.contains("long (not trained: 0, 1; not scored: none)"));

    // A leg with more seeds than the other is compared by those that both have.
    stopped(
        &format!("{flags} --iters 300 --leg short.yaml --leg other.yaml --output c"),
        "Training other seed-1 (4 of 4)",
    );
    let report = folder.json("c/compare.json");
    assert_eq!((&report["seeds"], &report["legs"][0]["seeds"]), (&json!(1), &json!([0])));
    assert!(report["legs"][0]["valid_losses"].as_array().unwrap().len() == 1);
    let sentence = report["sentences"][0].as_str().unwrap();
    assert!(!sentence.contains("seeds)") && sentence.contains("one seed cannot say"), "{sentence}");

    // What a sweep found is kept.
    stopped(
        &format!("{flags} --leg short.yaml --leg long.yaml --find-lr 1e-4,1e-3 --output d"),
        "Trying long at 1e-4 (2 of 4)",
    );
    let report = folder.json("d/compare.json");
    let sweep = report["legs"][0]["sweep"].as_array().unwrap();
    assert!(sweep.len() == 1 && sweep[0]["loss"].is_number() && report["sentences"] == json!([]), "{report}");
    assert_eq!(folder.names("d/long").iter().filter(|name| name.ends_with("1e-4")).count(), 0);
}

#[test]
fn a_base_of_a_try_that_came_to_nothing_is_used_again() {
    let folder = Folder::with_model();
    let flags = "compare --model model --data data --iters 1 --batch-size 2 --legs lora";
    folder.write("odd.yaml", "lora_parameters: {keys: [no.such.weight]}\n");
    let run = folder.run(&format!("{flags} -c odd.yaml"));
    assert!(run.status == Some(1) && run.err.contains("Making the dense base"), "{run:?}");
    let run = folder.ok(flags);
    assert!(run.err.contains("The dense base is there from an earlier try"), "{run:?}");
    folder.fails(2, flags, &["--output compare exists already"]);
}

#[test]
fn what_is_measured_survives_a_leg_and_a_scoring_that_fail() {
    let folder = Folder::with_model();
    let flags = "compare --model model --data data --iters 2 --batch-size 2";
    folder.write("good.yaml", "{}\n");
    folder.write("bad.yaml", "lora_parameters: {keys: [no.such.weight]}\n");
    let run = folder.run(&format!("{flags} --leg good.yaml --leg bad.yaml"));
    assert!(run.status == Some(1) && run.err.contains("leg bad"), "{run:?}");
    let report = folder.json("compare/compare.json");
    assert_eq!((report["legs"].as_array().unwrap().len(), &report["legs"][0]["name"]), (1, &json!("good")));

    // Nothing but the scoring reads test.jsonl with room for an answer.
    folder.rows("data/test.jsonl", &[row(&"hello ".repeat(3000), "a")]);
    let run = folder.run(&format!("{flags} --leg good.yaml --metric exact --output b"));
    assert!(run.status == Some(1) && run.err.contains("scoring leg good"), "{run:?}");
    let report = folder.json("b/compare.json");
    assert!(report["legs"][0]["train_loss"].is_number() && report["legs"][0]["score"].is_null());
}
