//! Bases in MLX's modes of floats, from `convert` to `fuse`.

use crate::setting::{Folder, llama};

#[test]
fn a_base_of_floats_goes_the_whole_way() {
    let folder = Folder::new();
    folder.model("model", &llama(None));
    for (mode, bits, group) in [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)] {
        let run = folder.ok(&format!("convert --hf-path model --mlx-path {mode} -q --q-mode {mode}"));
        assert!(run.err.contains("packed 15 modules"), "{run:?}");
        let block = &folder.json(&format!("{mode}/config.json"))["quantization"];
        assert_eq!((block["mode"].as_str(), block["bits"].as_i64()), (Some(mode), Some(bits)));
        let form = format!("{mode}, {bits} bits, groups of {group}");
        assert!(folder.ok(&format!("inspect {mode}")).out.contains(&form));
        folder.ok(&format!("generate --model {mode} --max-tokens 2"));
        folder.ok(&format!("generate --model {mode} --max-tokens 2 --exact"));
        folder.ok(&format!("perplexity --model {mode} --data-path data --sequence-length 48 --batch-size 2"));
        let train = format!(
            "lora --train --model {mode} --data data --adapter-path {mode}-a --fine-tune-type dora --num-layers -1 \
             --iters 4 --batch-size 2 --learning-rate 1e-2"
        );
        folder.ok(&train);
        let fuse = format!("fuse --model {mode} --adapter-path {mode}-a --save-path {mode}-f");
        let same = folder.ok(&format!("{fuse} --policy same --data data --force"));
        assert!(same.out.contains(&format!("14 of {form} -> {form}")), "{same:?}");
        let dense = folder.ok(&format!("{fuse} --policy dense --data data"));
        assert!(dense.out.contains(&format!("14 of {form} -> float32")), "{dense:?}");
        let raise = folder.ok(&format!("{fuse} --policy raise --data data"));
        assert!(raise.out.contains(&form) && !raise.out.contains(&format!("-> {form}")), "{raise:?}");
        folder.ok(&format!("generate --model {mode}-f --max-tokens 1"));
        folder.fails(1, &format!("{fuse} --policy fold"), &[mode, "choose raise, same or dense"]);
        folder.ok(&format!("export gguf --model {mode} --out {mode}.gguf"));
        folder.ok(&format!("convert --hf-path {mode} --mlx-path {mode}-dense -d"));
        assert!(folder.json(&format!("{mode}-dense/config.json")).get("quantization").is_none());
    }
}
