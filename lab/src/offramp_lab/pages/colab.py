"""A hook of mkdocs: a badge above each notebook that opens it in Colab, once the repository has an
address (`repo_url` in mkdocs.yml) on GitHub."""

from typing import Any

COLAB = "https://colab.research.google.com"
_GITHUB = "https://github.com/"


def on_page_content(html: str, page: Any, config: Any, files: object) -> str:
    """The page with its badge; pages that are no notebooks stay as they are."""
    address = (config.repo_url or "").rstrip("/")
    name = page.file.src_uri
    if not name.endswith(".ipynb") or not address.startswith(_GITHUB):
        return html
    link = f"{COLAB}/github/{address.removeprefix(_GITHUB)}/blob/main/docs/{name}"
    return (
        f'<p><a href="{link}"><img src="{COLAB}/assets/colab-badge.svg" alt="Open in Colab"></a> '
        f"There, first run <code>!pip install 'offramp[all] @ git+{address}'</code>.</p>\n{html}"
    )
