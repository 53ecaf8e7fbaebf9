"""``swarmtune completion``: the script by which a shell asks ``swarmtune __complete`` for words."""

from __future__ import annotations

from swarmtune.commands.arguments import Parser

SCRIPTS = {
    "bash": """\
# Completion of swarmtune in bash: eval "$(swarmtune completion bash)" in ~/.bashrc.
_swarmtune() {
    local reply
    COMPREPLY=()
    while IFS= read -r reply; do
        COMPREPLY+=("$reply")
    done < <("${1/#\\~/$HOME}" __complete bash "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
}
complete -o nospace -F _swarmtune swarmtune
""",
    "zsh": """\
#compdef swarmtune
# Completion of swarmtune in zsh: source <(swarmtune completion zsh) in ~/.zshrc, after compinit.
_swarmtune() {
    local reply
    local -a whole begun
    for reply in ${(f)"$("${(Q)words[1]/#\\~/$HOME}" __complete zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)"}; do
        if [[ $reply == *[=./] ]]; then begun+=("$reply"); else whole+=("$reply"); fi
    done
    (( $#begun )) && compadd -S '' -- "${begun[@]}"
    (( $#whole )) && compadd -- "${whole[@]}"
    return 0
}
compdef _swarmtune swarmtune
""",
    "fish": """\
# Completion of swarmtune in fish: swarmtune completion fish > ~/.config/fish/completions/swarmtune.fish
function __swarmtune_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    $before[1] __complete fish $before[2..-1] "$current" 2>/dev/null
end
complete -c swarmtune -f -a '(__swarmtune_complete)'
""",
}


def parser() -> Parser:
    """What the verb takes."""
    made = Parser(
        "completion",
        "Print the script that completes verbs, recipes, keys, values and files.",
        'bash: eval "$(swarmtune completion bash)" in ~/.bashrc\n'
        "zsh:  source <(swarmtune completion zsh) in ~/.zshrc, after compinit\n"
        "fish: swarmtune completion fish > ~/.config/fish/completions/swarmtune.fish",
    )
    made.add_argument("shell", choices=sorted(SCRIPTS))
    return made


def main(words: list[str]) -> int:
    """Print; returns the exit code."""
    print(SCRIPTS[parser().read(words).shell], end="")
    return 0
